/* What a kernel is, which kernels there are, and how one is launched. */
#ifndef HF_SWIGLU_KERNELS_H
#define HF_SWIGLU_KERNELS_H

#include <stdint.h>

enum { FLOAT32, BFLOAT16, FLOAT16, DTYPES };
enum { FORWARD, BACKWARD, DIRECTIONS };

/* Members of the family with a kernel of their own; GENERAL serves all others, whatever their `Params`. */
enum { SILU_TIMES_UP, SWIGLU_TIMES_UP, SWIGLU_ALONE, GENERAL, VARIANTS };

/* Inputs first: gate, up, out; or grad_out, gate, up, grad_gate, grad_up. */
enum { MAX_OPERANDS = 5 };

/* The fields of reference.GLUParams in their order, with limits in the tensors' dtype; then the largest gate, activation
   and magnitude of up at which a clamp passes the gradient. */
typedef struct {
    int power;
    float alpha, gate_limit, act_limit, up_limit, up_offset;
    float gate_passes, act_passes, up_passes;
} Params;

/* Computes `count` adjacent elements. The pointers of an absent `up` are NULL; outputs may be inputs. */
typedef void KernelFunction(char *const *operands, int64_t count, const Params *params);

/* The kernels of one group of processors, in the sense of torch.backends.cpu.get_cpu_capability. */
typedef struct {
    const char *name;
    KernelFunction *kernels[DIRECTIONS][DTYPES][VARIANTS];
} CpuCapability;

extern const CpuCapability cpu_capability_baseline;

/* On other processors the compiler's own vectors serve alone. */
#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_X86_CAPABILITIES
extern const CpuCapability cpu_capability_avx2, cpu_capability_avx512, cpu_capability_avx512_vnni;
/* Older compilers do not know it. */
#if defined(__clang__) ? __clang_major__ >= 15 : __GNUC__ >= 12
#define HAVE_AVX512_FP16
extern const CpuCapability cpu_capability_avx512_fp16;
#endif
#endif

/* One tensor of a launch: `data` is NULL for an absent one; strides count elements. */
typedef struct {
    char *data;
    int64_t row_stride, column_stride;
} Operand;

typedef struct {
    KernelFunction *kernel;
    Params params;
    int inputs, operands, element_size, threads;
    int64_t rows, columns;
    Operand operand[MAX_OPERANDS];
} Launch;

static inline int element_size(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* Runs the kernel over all rows, on up to `threads` threads. */
void launch_kernel(const Launch *launch);

#endif
