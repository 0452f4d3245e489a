"""Networks: what a teacher or a student can be, and how any of them is called."""
