"""What other stacks call our keys, by the sections of ours that they belong to."""
