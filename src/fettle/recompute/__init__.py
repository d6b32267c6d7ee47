"""What a layer keeps for the backward pass, and the allocator's settings that go with it."""
