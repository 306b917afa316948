"""What happens to one block: its layers each by itself, or jointly, and a last descent."""
