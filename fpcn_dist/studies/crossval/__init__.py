"""Many small trainings on one set of photographs, cross-validated and compared in pairs: does what FPCN adds pay?"""
