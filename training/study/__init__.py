"""Every claim of the article shown by numbers and pictures, in one report that is also the tutorial."""
