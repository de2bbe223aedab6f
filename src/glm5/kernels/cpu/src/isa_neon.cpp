#define GLM5_ISA neon
#define GLM5_ISA_NAME "neon"
#include "isa.inl"
