"""Write the report of an evaluation, and compare two reports."""
