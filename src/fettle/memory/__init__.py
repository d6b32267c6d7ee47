"""What a run keeps in memory, what that costs, and the plan that fits a budget."""
