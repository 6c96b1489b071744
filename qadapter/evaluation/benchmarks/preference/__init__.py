"""Which of two replies is the better one?"""
