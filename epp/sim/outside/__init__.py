"""What a simulation needs of the machine that it runs on: other processes, files, something to draw with."""
