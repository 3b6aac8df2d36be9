"""From measurements to profiles: what each part of an iteration costs, and how well that is known."""
