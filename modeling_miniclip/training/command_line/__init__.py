"""Flags, recipes and what the launcher was given.

arguments.py: all flags with their defaults and help
derived.py: defaults that depend on the data and the model, by stated rules
parsing.py: the command line and its recipe as arguments
recipes.py: read a recipe or keyword arguments, save arguments as a recipe
check_arguments.py: check the values of arguments
launch.py: what the launcher was given: its command line, launch file and environment
launch_settings.py: each setting of the launcher, and what happens to it
"""
