"""Which of these replies answers this prompt?"""
