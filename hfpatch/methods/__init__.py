"""Table of contents: one import a method, sorted. Importing a module registers its patcher."""
