"""Kills audits while they work, resumes them, and proves that nothing was lost, doubled or changed."""
