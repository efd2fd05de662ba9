"""Methods x seeds as runs, and what their results say about each other."""
