#include "capabilities.h"

#include <stddef.h>

const CpuCapability *capability = &cpu_capability_baseline;

static int is_supported(const CpuCapability *candidate)
{
#ifdef HAVE_X86_CAPABILITIES
    if (candidate == &cpu_capability_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (candidate == &cpu_capability_avx2)
        /* Every processor with AVX2 has F16C, which not every compiler can test for. */
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return candidate == &cpu_capability_baseline;
}

/* Best first. */
static const CpuCapability *const capabilities[] = {
#ifdef HAVE_X86_CAPABILITIES
    &cpu_capability_avx512, &cpu_capability_avx2,
#endif
    &cpu_capability_baseline,
};

const CpuCapability *supported_capability(int index)
{
    for (size_t i = 0; i < sizeof capabilities / sizeof capabilities[0]; i++)
        if (is_supported(capabilities[i]) && index-- == 0)
            return capabilities[i];
    return NULL;
}

void choose_best_capability(void)
{
#ifdef HAVE_X86_CAPABILITIES
    __builtin_cpu_init();
#endif
    capability = supported_capability(0);
}
