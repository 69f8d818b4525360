"""What makes a network small."""
