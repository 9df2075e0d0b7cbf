"""What one trainer adds to the house: a frozen recipe each."""
