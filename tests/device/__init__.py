"""What the compilers made of the device code: every kernel's instructions, loops and resources on every architecture."""
