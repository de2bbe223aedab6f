#define GLM5_ISA avx2
#define GLM5_ISA_NAME "avx2"
#include "isa.inl"
