"""The page of a report: charts as SVG, figures as files, terms explained, and what is stored to write it again."""
