"""What one row of a data set is, for each objective."""
