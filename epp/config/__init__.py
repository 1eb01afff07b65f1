"""What did the operator ask for? EndpointPickerConfig, checked, with file, line and path in every error. Pure but
for reading the file."""
