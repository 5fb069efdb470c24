/* What the pieces of the extension share: the words for a product, and who computes it. */
#ifndef HF_SWIGLU_KERNELS_H
#define HF_SWIGLU_KERNELS_H

#include <stdint.h>

enum { FLOAT32, BFLOAT16, FLOAT16, DTYPES };
enum { FORWARD, BACKWARD, DIRECTIONS };

/* Members of the family with a loop of their own; GENERAL is all the others, whatever their `Gating`. */
enum { SILU_TIMES_UP, SWIGLU_TIMES_UP, SWIGLU_ALONE, GENERAL, VARIANTS };

/* Inputs first: gate, up, out; or grad, gate, up, grad_gate, grad_up. */
enum { MAX_OPERANDS = 5 };

/* The fields of reference.Gating, in its order, with limits in the tensors' dtype; and the largest gate, activation and
   magnitude of up at which a clamp passes the gradient. */
typedef struct {
    int power;
    float alpha, gate_limit, act_limit, up_limit, up_offset;
    float gate_passes, act_passes, up_passes;
} Gating;

/* Computes `count` adjacent elements. A pointer is NULL where there is no `up`; outputs may be inputs. */
typedef void RunFunction(char *const *operands, int64_t count, const Gating *gating);

typedef struct {
    const char *name;
    RunFunction *run[DIRECTIONS][DTYPES][VARIANTS];
} InstructionSet;

extern const InstructionSet instruction_set_baseline;

/* Elsewhere the compiler's own vectors are all there is. */
#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_X86_INSTRUCTION_SETS
extern const InstructionSet instruction_set_avx2, instruction_set_avx512;
#endif

/* One operand: `data` is NULL where there is none; strides count elements. */
typedef struct {
    char *data;
    int64_t row_stride, column_stride;
} Operand;

typedef struct {
    RunFunction *run;
    Gating gating;
    int inputs, operands, element_size, threads;
    int64_t rows, columns;
    Operand operand[MAX_OPERANDS];
} Job;

static inline int element_size(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

void run_job(const Job *job);

#endif
