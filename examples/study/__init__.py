"""A study of the method on real data: its arms, its runs, their results."""
