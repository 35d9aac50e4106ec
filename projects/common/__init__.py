"""What two or more methods share, each thing once."""
