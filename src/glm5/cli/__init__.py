"""The command line: `glm5 chat | generate | train | quantize | info`."""
