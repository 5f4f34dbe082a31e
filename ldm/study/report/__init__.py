"""Reports: what the rows of a sweep or the folder of a run say, as one page, figures for print, LaTeX and Markdown."""
