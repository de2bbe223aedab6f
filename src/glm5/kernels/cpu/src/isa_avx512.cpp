#define GLM5_ISA avx512
#define GLM5_ISA_NAME "avx512"
#include "isa.inl"
