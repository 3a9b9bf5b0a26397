// sm_75: fp16 through m16n8k8 and without cp.async, the product on fused multiply-adds; bf16 and tf32 do not exist.
#define LOCALSGD_ARCH 750
#include "test_cuda_gram.cpp"
