/* Which CPU capabilities this processor has, read from cpuid, and the one in use. */
#include "capabilities.h"

#include <stddef.h>

const CpuCapability *capability = &cpu_capability_baseline;

#ifdef HAVE_AVX512_FP16
#include <cpuid.h>

/* Read from the processor: not every compiler that has the instructions can test for them. */
static int has_avx512_fp16(void)
{
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 23 & 1);
}
#endif

static int is_supported(const CpuCapability *candidate)
{
#ifdef HAVE_X86_CAPABILITIES
    const int has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const int has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
#ifdef HAVE_AVX512_FP16
    if (candidate == &cpu_capability_avx512_fp16)
        return has_vnni && has_avx512_fp16();
#endif
    if (candidate == &cpu_capability_avx512_vnni)
        return has_vnni;
    if (candidate == &cpu_capability_avx512)
        return has_avx512;
    if (candidate == &cpu_capability_avx2)
        /* Every processor with AVX2 has F16C, which not every compiler can test for. */
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return candidate == &cpu_capability_baseline;
}

/* Best first. */
static const CpuCapability *const capabilities[] = {
#ifdef HAVE_AVX512_FP16
    &cpu_capability_avx512_fp16,
#endif
#ifdef HAVE_X86_CAPABILITIES
    &cpu_capability_avx512_vnni, &cpu_capability_avx512, &cpu_capability_avx2,
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
