"""What a run leaves for people to look at: one HTML file, a chart in the terminal, a picture."""
