"""The mistakes of which the messages are met, and the remedies that these name, by room."""
