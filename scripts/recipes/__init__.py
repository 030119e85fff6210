"""The papers' tables: shell files that fetch what a table needs and call ``fewstep fid``, and what converts files."""
