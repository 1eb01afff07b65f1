"""May it run now, under which name and how important is it? Objectives, rewrites, saturation, admission."""
