/* The kernels for processors with AVX2, FMA and F16C (2013 and later). */
#include "kernels.h"

#ifdef HAVE_X86_CAPABILITIES
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define INLINE static inline __attribute__((always_inline))
#include "vector_avx2.h"
#include "loops.h"

const CpuCapability cpu_capability_avx2 = CPU_CAPABILITY("AVX2");

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
