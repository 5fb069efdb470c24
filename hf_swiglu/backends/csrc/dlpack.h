/* The parts of DLPack's C interface that are used, under the names of its specification
   (https://dmlc.github.io/dlpack/latest/c_api.html), with the layout of major version 1 on 64-bit processors. */
#ifndef HF_SWIGLU_DLPACK_H
#define HF_SWIGLU_DLPACK_H

#include <stddef.h>
#include <stdint.h>

enum { DLPACK_MAJOR_VERSION = 1 };

/* DLDeviceType and DLDataTypeCode. */
enum { kDLCPU = 1 };
enum { kDLFloat = 2, kDLBfloat = 4 };

typedef struct {
    uint32_t major, minor;
} DLPackVersion;

typedef struct {
    int32_t device_type, device_id;
} DLDevice;

typedef struct {
    uint8_t code, bits;
    uint16_t lanes;
} DLDataType;

typedef struct {
    void *data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;

typedef struct DLPackExchangeAPIHeader {
    DLPackVersion version;
    struct DLPackExchangeAPIHeader *prev_api;
} DLPackExchangeAPIHeader;

/* Only one of the functions is called; the others have the type of any function. */
typedef struct {
    DLPackExchangeAPIHeader header;
    void (*managed_tensor_allocator)(void);
    void (*managed_tensor_from_py_object_no_sync)(void);
    void (*managed_tensor_to_py_object_no_sync)(void);
    int (*dltensor_from_py_object_no_sync)(void *py_object, DLTensor *out);
    void (*current_work_stream)(void);
} DLPackExchangeAPI;

#if UINTPTR_MAX == UINT64_MAX
_Static_assert(sizeof(DLPackVersion) == 8 && sizeof(DLDevice) == 8 && sizeof(DLDataType) == 4, "DLPack's layout");
_Static_assert(offsetof(DLTensor, device) == 8 && offsetof(DLTensor, ndim) == 16, "DLPack's layout");
_Static_assert(offsetof(DLTensor, dtype) == 20 && offsetof(DLTensor, shape) == 24, "DLPack's layout");
_Static_assert(offsetof(DLTensor, strides) == 32 && offsetof(DLTensor, byte_offset) == 40, "DLPack's layout");
_Static_assert(sizeof(DLTensor) == 48 && sizeof(DLPackExchangeAPIHeader) == 16, "DLPack's layout");
_Static_assert(offsetof(DLPackExchangeAPI, dltensor_from_py_object_no_sync) == 40, "DLPack's layout");
_Static_assert(offsetof(DLPackExchangeAPI, current_work_stream) == 48, "DLPack's layout");
_Static_assert(sizeof(DLPackExchangeAPI) == 56, "DLPack's layout");
#endif

#endif
