"""From a configuration to trained stages: preflight, teachers, students, and their comparison."""
