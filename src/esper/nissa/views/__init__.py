"""What people look at: live view, report, charts, explanations."""
