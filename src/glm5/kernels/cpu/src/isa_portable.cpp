#define GLM5_ISA portable
#define GLM5_ISA_NAME "portable"
#include "isa.inl"
