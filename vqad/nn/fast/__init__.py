"""What computes the same in less time: each module says what it equals, and what was measured."""
