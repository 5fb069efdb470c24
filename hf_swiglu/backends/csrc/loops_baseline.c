/* The kernels for any processor, with what the compiler may assume of it (SSE2 on x86-64, NEON on arm64). */
#define INLINE static inline __attribute__((always_inline))
#include "vector_generic.h"
#include "loops.h"

const CpuCapability cpu_capability_baseline = CPU_CAPABILITY("baseline");
