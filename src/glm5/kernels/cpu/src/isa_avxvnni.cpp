#define GLM5_ISA avxvnni
#define GLM5_ISA_NAME "avxvnni"
#include "isa.inl"
