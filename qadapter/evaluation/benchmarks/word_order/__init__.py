"""word_order"""
