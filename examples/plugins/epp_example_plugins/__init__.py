"""Three plugins: a function, a function with a parameter, a class that remembers."""
