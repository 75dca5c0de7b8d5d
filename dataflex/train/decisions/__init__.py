"""What is written down of a decision, and what it did for each subtask."""
