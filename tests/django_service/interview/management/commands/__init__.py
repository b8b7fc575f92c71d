"""What the tests run as processes of their own."""
