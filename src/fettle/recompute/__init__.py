"""What a layer keeps for the backward pass: gradient checkpointing, offloading, and settings of the allocator."""
