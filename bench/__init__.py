"""Programs that print what something costs beside a yardstick in the same run; not tests."""
