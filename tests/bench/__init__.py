"""The measuring sticks: a wrong one makes every figure wrong."""
