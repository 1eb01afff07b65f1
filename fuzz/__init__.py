"""Coverage-guided fuzzing of what reads bytes of strangers; the properties themselves are in tests/."""
