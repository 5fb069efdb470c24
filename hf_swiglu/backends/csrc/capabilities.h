/* Which kernels this processor can run. */
#ifndef HF_SWIGLU_CAPABILITIES_H
#define HF_SWIGLU_CAPABILITIES_H

#include "kernels.h"

/* The capability in use: the best at first. */
extern const CpuCapability *capability;

void choose_best_capability(void);

/* The `index`-th capability that this processor has, best first; NULL after the last. */
const CpuCapability *supported_capability(int index);

#endif
